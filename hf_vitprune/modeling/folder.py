"""What folders of pruned models say to those who load them without this library."""

#: what config.json has in the place of the residual width: stock configs refuse it, and quote it
NOT_STOCK = (
    "pruned with hf_vitprune: import hf_vitprune before loading, and load with an Auto class or a Pruned class; stock "
    "classes cannot hold this shape"
)
#: the same where a file of code is beside it
PORTABLE = (
    "pruned with hf_vitprune: load with an Auto class and trust_remote_code=True, or import hf_vitprune before "
    "loading; stock classes cannot hold this shape"
)
#: the module that ``auto_map`` names
STUB_MODULE = "modeling_hf_vitprune"
#: what that holds in folders that are not portable
STUB = '''"""Loads a vision transformer pruned with hf_vitprune; needs `pip install hf_vitprune`."""

from hf_vitprune.modeling import {imports}

__all__ = [{exports}]
'''
