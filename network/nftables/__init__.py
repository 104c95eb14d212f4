"""The nftables tables: elements, rule sets, and the effect of other firewalls on pods."""
