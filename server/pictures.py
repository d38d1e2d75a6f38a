"""The images that a client sends: as data: URLs, or as http(s) URLs that are fetched from public addresses only.

    read = functools.partial(read_url, may_fetch=True)
    messages = images.read_parts(messages, options, read)    # UserError for what is no image, or may not be fetched

A client names the URL, and this machine may reach what the client may not: its own services, its network's, a cloud's
metadata. So each name is looked up once, all of its addresses have to be public, and the connection goes to the address
that was checked; every redirect is checked like the first. Size and time are limited. No proxy is used.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, urljoin, urlsplit

from errors import UserError
from files import gb
from images import ImageInput, ImageOptions, decode_data_url, read_image

MAX_BYTES = 20 * 2**20  # of an image that is fetched
SECONDS = 10.0  # in which it has to come, redirects included
REDIRECTS = 3
MOVED = (301, 302, 303, 307, 308)
CHUNK = 2**16
# IPv6 addresses that stand for the IPv4 address at their end.
EMBEDDED = [ipaddress.ip_network(network) for network in ("64:ff9b::/96", "::/96")]
DECODING = threading.BoundedSemaphore(2)  # unpacked images are large, and clients are many


def read_url(url: str, options: ImageOptions, low: bool, may_fetch: bool = False) -> ImageInput:
    """An image of a data: URL, or where it may be fetched of another one."""
    if url.startswith("data:"):
        data = decode_data_url(url)
    elif url.lower().startswith(("http://", "https://")):
        if not may_fetch:
            raise UserError("image_url: this server fetches no images; send it as data:image/png;base64,...")
        data = fetch(url)
    else:
        raise UserError(f"image_url: {url[:40]!r} is neither a data: nor an http URL; send data:image/png;base64,...")
    with DECODING:
        return read_image(data, options, low=low)


def fetch(url: str) -> bytes:
    """What an http(s) URL holds. UserError, which tells no more than a client may know, where it cannot be had."""
    deadline = time.monotonic() + SECONDS
    try:
        for _ in range(REDIRECTS + 1):
            parts = checked(url)
            with connection_to(parts, deadline) as connection:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"Accept": "image/*", "User-Agent": "gpt-brisk"})
                response = connection.getresponse()
                if response.status == 200:
                    data = body_of(response)
                    if time.monotonic() >= deadline:  # then this may be a part of it
                        raise TimeoutError
                    return data
                if response.status not in MOVED or not response.getheader("Location"):
                    raise UserError(f"image_url: the image cannot be fetched (status {response.status}); check its URL")
                url = urljoin(url, response.getheader("Location"))
        raise UserError(f"image_url: it redirects more than {REDIRECTS} times; give the image's own URL")
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() >= deadline
        why = f"it took more than {SECONDS:.0f} seconds" if late else type(error).__name__
        raise UserError(f"image_url: the image cannot be fetched ({why}); check its URL, or send its data") from error


def checked(url: str) -> SplitResult:
    """The parts of an http(s) URL. ValueError for what is none."""
    parts = urlsplit(url)
    printable = url.isascii() and url.isprintable() and " " not in url
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None or not printable:
        raise UserError("image_url: it is, or redirects to, no plain http(s) URL; give the image's own URL")
    return parts


@contextlib.contextmanager
def connection_to(parts: SplitResult, deadline: float) -> Iterator[http.client.HTTPConnection]:
    """A connection to a public address of the host, which ends at the deadline, come what may."""
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port)
    address = public_address(parts.hostname, connection.port)
    sock = socket.create_connection((address, connection.port), timeout=max(deadline - time.monotonic(), 0.001))
    # A timeout is of one read, and a server may send a byte from time to time.
    timer = threading.Timer(max(deadline - time.monotonic(), 0), lambda: shut(sock))
    timer.daemon = True
    timer.start()
    try:
        if secure:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=parts.hostname, do_handshake_on_connect=False)
            sock.do_handshake()
        connection.sock = sock
        yield connection
    finally:
        timer.cancel()
        connection.close()
        sock.close()


def shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def public_address(host: str, port: int) -> str:
    """An address of a host, all of which have to be public. UserError otherwise."""
    found = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(map(is_public, found)):
        raise UserError("image_url: its host is not on the public internet, so this server does not fetch from it")
    return found[0]


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet, and stands for none of another kind."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # with a zone: of a link
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if any(address in network for network in EMBEDDED):
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(str(other)) for other in inner if other is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
    return address.is_global and not address.is_multicast


def body_of(response: http.client.HTTPResponse) -> bytes:
    """The bytes of an answer, which may not be too many."""
    data = bytearray()
    while len(data) <= MAX_BYTES:
        chunk = response.read(CHUNK)
        if not chunk:
            break
        data += chunk
    if len(data) > MAX_BYTES:
        raise UserError(f"image_url: the image has more than {gb(MAX_BYTES)}; give a smaller one")
    if response.length:
        raise http.client.IncompleteRead(b"")
    return bytes(data)
