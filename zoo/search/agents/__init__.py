"""Agents that search for profiles, one file each."""
