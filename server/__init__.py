"""The aggregation server: the federation's folder, the round loop, the sites' membership and their updates' means."""
