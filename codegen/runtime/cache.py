"""Generated kernels on disk and in memory; see :mod:`sparse_compile.codegen.runtime.generated`."""

from sparse_compile.codegen.runtime.generated import (
    cache_dir,
    load_module,
    source_path,
    write_source,
)

__all__ = ["cache_dir", "load_module", "source_path", "write_source"]
