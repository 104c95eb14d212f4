"""How a container ends: noticed, waited for, explained and recorded."""
