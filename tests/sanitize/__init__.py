"""The native engine under sanitizers, for a night: ``make sanitize``.

The extension is built with AddressSanitizer and UndefinedBehaviorSanitizer into ``build/sanitize`` and loaded by the
Python tests in place of the usual one; LeakSanitizer looks at each process that ends by itself. The native tests run
longer than in ``make test``, with new seeds. ``planted.cpp`` holds faults that must be found, or all of it is blind.
"""
