"""Request fields, their bounds and supported media formats, shared by engine and gateway."""
