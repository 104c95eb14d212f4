"""The nftables tables: elements, rule sets and how other firewalls treat pods."""
