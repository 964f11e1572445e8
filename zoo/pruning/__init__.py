"""Pruning: graph -> groups, policies and criteria -> plan, plan -> surgery or mask."""
