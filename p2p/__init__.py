"""A gossip node: it trains, exchanges updates with its peers over gRPC, and averages, with no server."""
