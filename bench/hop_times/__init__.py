"""Where one request's time goes, hop by hop: `python -m bench hops`."""
