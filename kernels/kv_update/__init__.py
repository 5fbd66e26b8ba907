"""``kv_update``: new entries written into the fixed slots of a cache.

In graphs this write is ``aten.index_copy`` along the slots (see :mod:`tokcc.passes.cache.storages.in_place`), which
frameworks compile well themselves; the kernel is for runtimes that take kernels, such as TensorRT's plugins.
"""
