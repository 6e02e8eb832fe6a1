"""The published code of the methods with its faults, as subclasses that compat="official" chooses."""
