"""What a site says of a result in sums."""
