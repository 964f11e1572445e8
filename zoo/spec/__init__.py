"""What is written down: profiles, channel groups, plans, costs. Plain dataclasses, no networks."""
