"""How a server listens and what it tolerates. The defaults suit a robot on the same machine or network."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ConfigError


@dataclass(frozen=True)
class ServerOptions:
    """Settings of one PolicyServer.

    host               address to listen on; the default is reachable from this machine only
    port               0 = a free one, read it from `PolicyServer.port`
    api_key            required as `Authorization: Api-Key KEY`; None = everybody may connect
    max_message_bytes  larger requests end their connection with code 1009
    max_fragments      websocket fragments of one message
    max_connections    further handshakes are answered 503
    max_waiting        requests in line for the policy; one more is answered with an error frame
    send_timeout_s     a client that does not read its answer for this long is cut off
    ping_interval_s    keepalive; a client that does not answer for another such time is cut off. None = off
    inline_below_ms    a `quick` policy's answers to the only client are computed on the event loop, as long as the last
                       one took less than this: two threads fewer on the way. 0 = never
    shutdown_grace_s   how long a clean stop waits for requests in flight
    allowed_origins    browsers that may connect (Origin header); programs send none and are always allowed
    debug              error frames carry a traceback
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_message_bytes: int = 64 * 2**20
    max_fragments: int = 4096
    max_connections: int = 64
    max_waiting: int = 64
    send_timeout_s: float = 10.0
    ping_interval_s: float | None = 20.0
    inline_below_ms: float = 50.0
    shutdown_grace_s: float = 30.0
    allowed_origins: tuple[str, ...] = ()
    debug: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError("port cannot be used", got=self.port, wanted="0 (a free one) to 65535")
        if self.api_key is not None and (not self.api_key.strip() or not self.api_key.isprintable()):
            raise ConfigError(
                "api key cannot be used", wanted="printable text that is not empty", do="check the key file"
            )
        for name in ("max_message_bytes", "max_fragments", "max_connections", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} cannot be used", got=getattr(self, name), wanted="at least 1")
        if not self.inline_below_ms >= 0:
            raise ConfigError("inline_below_ms cannot be used", got=self.inline_below_ms, wanted="0 (never) or more")
        for name in ("send_timeout_s", "shutdown_grace_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} cannot be used", got=getattr(self, name), wanted="more than 0 seconds")
