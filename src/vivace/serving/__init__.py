"""Policies over the wire: protocol code apart from policy code.

scan (bounds) <- protocol (bytes) <- results (ActionChunk -> dict) <- worker (who is next) <- session (a client) <- server
                 protocol <- decoder (a robot's next request) <- session
                 protocol <- client (a robot's side)
"""

from .client import PolicyClient
from .protocol import pack, unpack
from .server import PolicyServer, ServedPolicy
from .thread import ServerHandle, serve_in_thread

__all__ = ["PolicyClient", "PolicyServer", "ServedPolicy", "ServerHandle", "pack", "serve_in_thread", "unpack"]
