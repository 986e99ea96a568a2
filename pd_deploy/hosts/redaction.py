"""Taking out of what tools print what is nobody else's business. Pure.

The same value becomes the same other value everywhere in a capture, so that what belongs together
still does.
"""

import re
from ipaddress import IPv4Address, IPv6Address
from re import Match

GONE = "REDACTED"
SHORT = 3
_NUMBERS = r"(?:serial|uuid|die id|asset|username|registry token|\bsn\b)"
_SECRETS = (
    r"[\w.-]*(?:token|secret|passw(?:or)?d|credential|api_?key|private_?key|access_?key)[\w.-]*"
)
_PATTERNS = (
    # `Serial Number : 0330…`, and Docker's `ID: …`
    (re.compile(rf"^([\s\"]*[^:\n]*{_NUMBERS}[^:\n]*:\s*)\S.*$", re.I | re.M), rf"\g<1>{GONE}"),
    (re.compile(r"^(\s*ID: )\S+$", re.M), rf"\g<1>{GONE}"),
    (re.compile(r"(://)[^/\s@]+@"), rf"\g<1>{GONE}@"),
    (re.compile(rf"({_SECRETS}\"?\s*[=:]\s*)(?:\"[^\"]*\"|\S+)", re.I), rf"\g<1>{GONE}"),
    # Who a certificate is for.
    (re.compile(r"(subject)\[[^\]]*\]"), rf"\g<1>[{GONE}]"),
)
_MAC = re.compile(r"\b(?:[0-9a-f]{2}:){5}[0-9a-f]{2}\b", re.I)
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
_IPV6 = re.compile(r"(?<![\w:])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:])", re.I)


class Redaction:
    """What is put in place of what.

    Args:
        names: what the host is called there, each with what it is called in the capture.
        keep_addresses: whether public addresses stay.
    """

    def __init__(self, names: dict[str, str], *, keep_addresses: bool = False) -> None:
        # A shorter one would be found in other words.
        self._names = {name: other for name, other in names.items() if len(name) > SHORT}
        self._keep_addresses = keep_addresses
        self._macs: dict[str, str] = {}
        self._addresses: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """Return a text without serial numbers, secrets and, unless they stay, public addresses."""
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        for name, other in self._names.items():
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", other, text)
        text = _MAC.sub(self._mac, text)
        if self._keep_addresses:
            return text
        return "".join(map(self._without_addresses, text.splitlines(keepends=True)))

    def _without_addresses(self, line: str) -> str:
        # Versions look like addresses.
        if re.search("version|driver|firmware", line, re.IGNORECASE):
            return line
        return _IPV6.sub(self._address, _IPV4.sub(self._address, line))

    def _mac(self, match: Match[str]) -> str:
        address = match[0].lower()
        if address in ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"):
            return match[0]
        number = len(self._macs) + 1
        return self._macs.setdefault(address, f"02:00:00:00:{number // 256:02x}:{number % 256:02x}")

    def _address(self, match: Match[str]) -> str:
        try:
            address = IPv6Address(match[0]) if ":" in match[0] else IPv4Address(match[0])
        except ValueError:
            return match[0]
        if not address.is_global:
            return match[0]
        number = len(self._addresses) + 1
        # Addresses for documents.
        other = f"2001:db8::{number:x}" if address.version == 6 else f"198.51.100.{number}"
        return self._addresses.setdefault(match[0], other)
