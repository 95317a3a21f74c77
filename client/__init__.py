"""A site of a federation: its folder, its three processes, and the answers to the server's orders."""
