"""Profiles, channel groups, plans and costs: plain dataclasses, no networks."""
