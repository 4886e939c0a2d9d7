"""Native CPU kernels: ``attention`` (see :class:`farshore.kernels.base.Kernels`), ``dense`` and ``packed``.

Each module checks the arguments and calls the C++ in ``native/``, compiled as ``_native`` when the package is
installed. Importing ``attention``, ``dense`` or ``packed`` raises ImportError where it was not compiled.
"""
