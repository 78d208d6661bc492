"""Fetching what strangers name, without being led astray: only public addresses, in bounded size and time.

The host of every hop is resolved once, all its addresses are checked, and the connection goes to one that was
checked; `Host` and the certificate's name stay those of the address that was asked for. No proxy from the
environment is used, which would resolve anew.
"""

import asyncio
import ipaddress
import socket
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urljoin, urlsplit, urlunsplit

import httpcore2 as httpcore

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

REDIRECTS = 3
"""Most hops after the first address."""
MOVED = frozenset((301, 302, 303, 307, 308))
REFUSED: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "100.64.0.0/10",  # shared by carriers
        "::ffff:0:0/96",  # these four hold an IPv4 address that a gateway would go on to
        "64:ff9b::/96",
        "2002::/16",
        "2001::/32",
        "192.88.99.0/24",  # relays to the third of them
    )
)
"""Networks refused beside those that Python knows as private, loopback, link-local or reserved."""
UNICAST = ipaddress.IPv6Network("2000::/3")
"""All that is given out of IPv6 for the open Internet."""
LONGEST_URL = 4096
"""Letters."""


class FetchError(Exception):
    """Why an address was not fetched: one line for the caller, which tells nothing of this network."""


class TooLargeError(FetchError):
    """More lies there than is taken."""


class RefusedError(FetchError):
    """An address that may not be fetched from, now or later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What may be fetched."""

    allowed: tuple[str, ...] = ()
    """Host names or networks; with any given, nothing else, and these even where they are private."""
    max_bytes: int
    seconds: float
    """Time in all, redirects included."""


def is_public(address: Address) -> bool:
    """Tell whether an address is one of the open Internet, and holds no other address.

    >>> is_public(ipaddress.ip_address("1.1.1.1")), is_public(ipaddress.ip_address("169.254.169.254"))
    (True, False)
    """
    if any(address in network for network in REFUSED if network.version == address.version):
        return False
    if address.version == 6 and address not in UNICAST:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class Web:
    """Asks servers that strangers name; one for all requests."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self._networks = tuple(_networks(rules.allowed))
        self._names = frozenset(name.lower().rstrip(".") for name in rules.allowed)

    async def get(self, url: str) -> bytes:
        """Return what lies at an address. Raises FetchError."""
        try:
            async with asyncio.timeout(self.rules.seconds):
                return await self._follow(url)
        except TimeoutError as error:
            raise FetchError(f"no complete answer within {self.rules.seconds:g} s") from error

    async def send(
        self, url: str, *, body: bytes, headers: Mapping[str, str], method: str = "POST"
    ) -> tuple[int, str | None]:
        """Send a body; return the status of the answer, which is not read, and its `Location`.

        Raises FetchError.
        """
        try:
            async with asyncio.timeout(self.rules.seconds):
                _, status, location = await self._ask(method, url, body=body, headers=headers, limit=0)
                return status, location
        except TimeoutError as error:
            raise FetchError(f"no answer within {self.rules.seconds:g} s") from error

    async def _follow(self, url: str) -> bytes:
        """Get an address and those it leads to."""
        for _ in range(1 + REDIRECTS):
            data, status, location = await self._ask("GET", url, limit=self.rules.max_bytes)
            if status not in MOVED:
                if status != 200:
                    raise FetchError(f"the server answered {status}")
                return data
            if location is None:
                raise FetchError(f"the server answered {status} and does not say where to go")
            scheme = urlsplit(url).scheme
            url = urljoin(url, location)
            if urlsplit(url).scheme != scheme:
                raise FetchError("it leads to another scheme")
        raise FetchError(f"it leads on more than {REDIRECTS} times")

    async def _ask(
        self,
        method: str,
        url: str,
        *,
        limit: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> tuple[bytes, int, str | None]:
        """Ask once; return at most `limit` bytes of the answer, its status, and where it leads."""
        url = checked_url(url)
        pool = httpcore.AsyncConnectionPool(network_backend=_Guarded(self))
        given = {"User-Agent": "seekvl", "Accept-Encoding": "identity", **(headers or {})}
        try:
            async with pool, pool.stream(method, url, headers=list(given.items()), content=body) as answer:
                found = {name.lower(): value for name, value in answer.headers}
                location = found.get(b"location")
                data = bytearray()
                if limit and answer.status == 200:
                    async for chunk in answer.aiter_stream():
                        data += chunk
                        if len(data) > limit:
                            raise TooLargeError(f"more than {limit:,} bytes")
                return bytes(data), answer.status, None if location is None else location.decode("latin-1")
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise FetchError("the server cannot be reached, or breaks off") from error
        except (httpcore.UnsupportedProtocol, ValueError, UnicodeError) as error:
            raise FetchError("the address is none") from error

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Resolve a host; return its addresses if every one of them may be asked. Raises FetchError."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise FetchError("its host has no address") from error
        names = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not names or not all(
            self._may(host, ipaddress.ip_address(name.partition("%")[0])) for name in names
        ):
            raise RefusedError("its host is not one that may be fetched from")
        return names

    def _may(self, host: str, address: Address) -> bool:
        """Tell whether this address of this host may be asked."""
        if not self.rules.allowed:
            return is_public(address)
        listed = any(address in network for network in self._networks if network.version == address.version)
        return listed or host.lower().rstrip(".") in self._names


class _Guarded(httpcore.AsyncNetworkBackend):
    """Connects to checked addresses only."""

    def __init__(self, web: Web) -> None:
        self._web, self._plain = web, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a host whose every address may be asked."""
        failed: OSError | httpcore.NetworkError | None = None
        for address in await self._web.addresses(host, port):
            try:
                return await self._plain.connect_tcp(
                    address,
                    port,
                    timeout=timeout,
                    local_address=local_address,
                    socket_options=socket_options,
                )
            except (OSError, httpcore.NetworkError) as error:
                failed = error
        raise httpcore.ConnectError(str(failed))

    async def sleep(self, seconds: float) -> None:
        """Wait between two tries."""
        await self._plain.sleep(seconds)


def checked_url(url: str) -> str:
    """Return a plain address of the web in ASCII, its host written as the resolver will read it.

    Raises FetchError for any other.

    >>> checked_url("http://①②⑦.⓪.⓪.①/猫.png")
    'http://127.0.0.1/%E7%8C%AB.png'
    """
    if len(url) > LONGEST_URL:
        raise FetchError(f"the address has {len(url):,} letters, at most {LONGEST_URL:,} are taken")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode("ascii"), parts.port
    except ValueError as error:  # a UnicodeError, too
        raise FetchError("the address is none") from error
    if parts.scheme not in ("http", "https") or not host:
        raise FetchError("only http: and https: addresses are fetched")
    if parts.username is not None or parts.password is not None:
        raise FetchError("an address with a user name is not fetched")
    if any(letter.isspace() or not letter.isprintable() for letter in url):
        raise FetchError("the address holds blanks or invisible letters")
    place = (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urlunsplit((parts.scheme, place, path, query, ""))


def _networks(names: Iterable[str]) -> Iterable[Network]:
    for name in names:
        try:
            yield ipaddress.ip_network(name, strict=False)
        except ValueError:
            continue  # a host name
