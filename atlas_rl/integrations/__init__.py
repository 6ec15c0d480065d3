"""Where Atlas meets the libraries it plugs into."""
