"""Images from other hosts, where the server allows them.

A client names the place, so the place may be within the server's network. Hence hosts are listed by
name, each address that a name stands for has to be public, the connection goes to an address that
was checked, and each redirect is checked as the first place was.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpx2

from vlm_tune.quoting import quoted
from vlm_tune.serving.api_errors import bad_media

REDIRECTS = 3
"""The most redirects that are followed for an image."""
GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
"""IPv6 addresses of the public internet; mapped and translated ones of IPv4 are not among them."""
PORTS = {"http": 80, "https": 443}

Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Returns the addresses of a host for a port."""


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, IPv4 first. Raises `OSError` where there are none."""
    loop = asyncio.get_running_loop()
    entries = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in entries]
    return sorted(dict.fromkeys(addresses), key=lambda address: ":" in address)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and of one host."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast
    # Tunnels' addresses lead to an IPv4 host within them.
    return ip.is_global and ip in GLOBAL_UNICAST and not (ip.sixtofour or ip.teredo)


class RemoteImages:
    """Fetches images from hosts on a list.

    Args:
        hosts: The hosts' names; none refuses every place.
        most_bytes: The largest image.
        seconds: The time for an image, redirects included.
        resolve: Finds the addresses of a host.
        transport: Sends requests in place of the network.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        most_bytes: int,
        seconds: float,
        resolve: Resolve = resolve,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = frozenset(hosts)
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._resolve = resolve
        self._transport = transport

    async def fetch(self, url: str) -> bytes:
        """Returns the bytes at a URL.

        Raises:
            ApiError: The place is refused, or there are no bytes, or too many of them.
        """
        if not self._hosts:
            raise bad_media(
                "this server fetches no images: send it as a data URL (data:image/png;base64,...)"
            )
        try:
            async with asyncio.timeout(self._seconds), self._client() as client:
                place = httpx2.URL(url)
                for _ in range(REDIRECTS + 1):
                    fetched = await self._try(client, place)
                    if isinstance(fetched, bytes):
                        return fetched
                    place = fetched
        except TimeoutError:
            raise bad_media(f"it took more than {self._seconds:g} seconds") from None
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            # The error's text may name addresses within the server's network.
            raise bad_media(f"it can't be fetched ({type(error).__name__})") from None
        raise bad_media(f"it is behind more than {REDIRECTS} redirects")

    def _client(self) -> httpx2.AsyncClient:
        # Proxies of the environment would resolve the name again.
        return httpx2.AsyncClient(trust_env=False, transport=self._transport, timeout=self._seconds)

    async def _try(self, client: httpx2.AsyncClient, place: httpx2.URL) -> bytes | httpx2.URL:
        """The bytes at a place, or the place that it redirects to."""
        address = await self._address(place)
        request = client.build_request(
            "GET",
            place.copy_with(host=address),
            headers={
                "Host": place.netloc.decode("ascii"),
                "Accept": "image/*",
                "Accept-Encoding": "identity",
            },
            extensions={"sni_hostname": place.raw_host.decode("ascii")},
        )
        response = await client.send(request, stream=True)
        try:
            if response.is_redirect:
                return place.join(response.headers.get("Location", ""))
            if response.status_code != 200:
                raise bad_media(f"the host answered with status {response.status_code}")
            return await self._body(response)
        finally:
            await response.aclose()

    async def _body(self, response: httpx2.Response) -> bytes:
        body = bytearray()
        # Undecoded: a compressed body may grow beyond any limit.
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > self._most_bytes:
                raise bad_media(f"it has more than {self._most_bytes:,} bytes")
        return bytes(body)

    async def _address(self, place: httpx2.URL) -> str:
        """The checked address of a place's host."""
        host = place.raw_host.decode("ascii").lower()
        port = PORTS.get(place.scheme)
        if port is None or place.port not in (None, port) or place.userinfo:
            raise bad_media("its URL is not of the form https://host/path")
        if host not in self._hosts:
            raise bad_media(f"the server fetches no images from {quoted(host)}")
        addresses = await self._resolve(host, port)
        if not addresses or not all(map(is_public, addresses)):
            raise bad_media(f"{quoted(host)} is no host of the public internet")
        return addresses[0]
