"""People as judges: who sees which pair in which order, how far they agree, and the page on which they judge."""
