"""The hub: knows keys and bytes, places blocks on sites, and never sees user code."""
