"""Reads tar streams: headers, pax records and members."""
