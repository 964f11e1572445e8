"""The commands of `zoo`: each is a dataclass of flags and a function.

Slow imports are inside the functions, so that `zoo --help` does not wait for them.
"""
