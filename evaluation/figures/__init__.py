"""What answers come to: metrics as functions of sums, their intervals, comparisons and gates. No torch."""
