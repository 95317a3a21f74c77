"""Arithmetic on updates, and the messages that carry them. No I/O, no clock, no sockets, no global random numbers."""
