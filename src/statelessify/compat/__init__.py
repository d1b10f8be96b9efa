"""Other libraries' interfaces, as thin layers over this one."""

__all__: list[str] = []
