"""Evidence: parity, timing, environment, reports. Nothing above imports it."""
