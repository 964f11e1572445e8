"""What the commands of `zoo` take and do: flags as dataclasses, each with its function.

Heavy imports are inside the functions: `zoo --help` waits for none of them.
"""
