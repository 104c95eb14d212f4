"""Reading tar streams: headers, pax records and members."""
