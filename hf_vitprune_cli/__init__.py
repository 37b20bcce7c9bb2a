"""The command line: one file a command.

It stands beside the package and not in it: whatever is imported from ``hf_vitprune`` first registers all that loading
needs, which takes seconds, and help and usage errors need none of it. A command imports the library when it runs.
"""
