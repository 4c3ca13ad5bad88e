"""A rank among its peers: addresses, connections, keys, generations. No torch here."""
