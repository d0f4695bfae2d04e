"""Measurements that the documentation quotes, each a command."""
