"""Policies over the wire: protocol code apart from policy code."""
