"""URLs of archives, the patterns that allow them, and the addresses they may lead to."""

from __future__ import annotations

import pytest

from pyserve.config.allowed_urls import AllowedUrls
from pyserve.config.archive_url import UrlError, goes_up, parse_url, query_without_secrets, without_secrets
from pyserve.fetch.public_address import AddressError, addresses_of, kind_of


@pytest.mark.parametrize(
    "text, base, target",
    [
        ("https://h.example/m.mar", "https://h.example/m.mar", "/m.mar"),
        ("HTTPS://H.Example:443/M.mar", "https://h.example/M.mar", "/M.mar"),
        ("http://h.example.:80/%7Ea%41%2b.mar", "http://h.example/~aA%2B.mar", "/~aA%2B.mar"),
        ("https://h:8443/a/m.mar?X-Sig=a/b&n=1", "https://h:8443/a/m.mar", "/a/m.mar?X-Sig=a/b&n=1"),
        ("https://[2001:DB8::0:1]:8443/m.mar", "https://[2001:db8::1]:8443/m.mar", "/m.mar"),
        ("https://10.0.0.1/m.mar", "https://10.0.0.1/m.mar", "/m.mar"),
        ("https://xn--bcher-kva.example/m.mar", "https://xn--bcher-kva.example/m.mar", "/m.mar"),
        ("file:///models/a%20b.mar", "file:///models/a%20b.mar", "/models/a%20b.mar"),
        ("file://localhost/m.mar", "file:///m.mar", "/m.mar"),
        ("s3://my-bucket.1/deep/m.mar", "s3://my-bucket.1/deep/m.mar", "/deep/m.mar"),
        ("gs://b/m.mar", "gs://b/m.mar", "/m.mar"),
        ("hf://Owner/repo@v1/m.mar", "hf://Owner/repo@v1/m.mar", "/repo@v1/m.mar"),
    ],
)
def test_url_has_one_normal_form(text: str, base: str, target: str) -> None:
    url = parse_url(text)
    assert (url.base, url.target) == (base, target)


@pytest.mark.parametrize(
    "text, reason, is_refused",
    [
        ("https://user@h/m.mar", "user name", True),
        ("https://good.example@evil.example/m.mar", "user name", True),
        ("https://good.example:80@evil.example/m.mar", "user name", True),
        ("https://good.example\\@evil.example/m.mar", "U\\+005C", True),
        ("https://h/a\\..\\m.mar", "U\\+005C", True),
        ("https://good.example%2f@evil.example/m.mar", "user name", True),
        ("https://good%2eexample/m.mar", "no name and no address", True),
        ("https://g\u043eod.example/m.mar", "U\\+043E", True),  # a Cyrillic letter
        ("https://good.example\u3002evil/m.mar", "U\\+3002", True),
        ("https://h:80:90/m.mar", "be separated", True),
        ("https://h:+80/m.mar", "be separated", True),
        ("https://[::1%25lo]/m.mar", "IPv6", True),
        ("https://[h]/m.mar", "IPv6", True),
        ("https://2130706433/m.mar", "four decimal numbers", True),
        ("https://0x7f000001/m.mar", "four decimal numbers", True),
        ("https://127.1/m.mar", "four decimal numbers", True),
        ("https://0177.0.0.1/m.mar", "four decimal numbers", True),
        ("https://a..b/m.mar", "no name and no address", True),
        ("https://-h/m.mar", "no name and no address", True),
        ("https://h/%2e%2e/m.mar", "'\\.\\.' in its path", True),
        ("https://h/%252e%252e/m.mar", "'\\.\\.' in its path", True),
        ("https://h/./m.mar", "'\\.\\.' in its path", True),
        ("https://h//m.mar", "empty part", True),
        ("https://h/a%2fm.mar", "hides a slash", True),
        ("https://h/a%5cm.mar", "hides a slash", True),
        ("https://h/a%252fm.mar", "hides a slash", True),
        ("https://h/m.mar%00.txt", "hides a slash", True),
        ("file://host/m.mar", "another machine", True),
        ("s3://a::http://x/m.mar", "empty part", True),
        ("s3://a::b/m.mar", "bucket", True),
        ("ftp://h/m.mar", "ftp://", True),
        ("https:///m.mar", "no host", False),
        ("https://h:0/m.mar", "port", False),
        ("https://h:99999/m.mar", "port", False),
        ("https://h:123456/m.mar", "port", False),
        ("https://h/a b.mar", "U\\+0020", False),
        ("https://h/m.mar#part", "fragment", True),
        ("https://h/%zz.mar", "hexadecimal", False),
        ("https://h/%ff.mar", "UTF-8", False),
        ("s3://b/m.mar?versionId=1", "query", False),
        ("file:///m.mar?x", "query", False),
    ],
)
def test_url_that_programs_could_read_differently_is_not_read_at_all(text: str, reason: str, is_refused: bool) -> None:
    with pytest.raises(UrlError, match=reason) as caught:
        parse_url(text)
    assert caught.value.is_refused == is_refused


@pytest.mark.parametrize("end", ["", "a/", ".hidden.mar", "a/.b", "%E2%80%AE.mar", "n" * 256])
def test_url_must_end_in_a_name_that_a_file_can_have(end: str) -> None:
    with pytest.raises(UrlError, match="ends"):
        _ = parse_url(f"https://h/{end}").file_name


def test_archive_is_called_as_the_url_ends_without_the_query() -> None:
    assert parse_url("https://h/a/my%20model.tar.gz?sig=/evil.mar").file_name == "my model.tar.gz"


@pytest.mark.parametrize(
    "text, up",
    [("../m", True), ("a/..", True), ("m..mar", True), ("%2e%2e/m", True), ("%252E.", True), ("m.mar", False),
     ("%" + "25" * 9 + "2e%2e", True)],
)  # fmt: skip
def test_dots_are_seen_however_they_are_encoded(text: str, up: bool) -> None:
    assert goes_up(text) == up


def test_secrets_are_not_shown() -> None:
    shown = without_secrets("https://user:pass@h/m.mar?X-Amz-Signature=abc&b=c%20;d=e#f")
    assert shown == "https://***@h/m.mar?X-Amz-Signature=***&b=***;d=***#f"
    assert without_secrets("https://h/m.mar") == "https://h/m.mar"


def test_secrets_in_the_query_of_a_call_are_not_shown() -> None:
    query = "url=https%3A%2F%2Fh%2Fm.mar%3Fsig%3Dabc&model_name=a+b&x=c=d&url=plain.mar"
    assert query_without_secrets(query) == (
        "url=https%3A%2F%2Fh%2Fm.mar%3Fsig%3D%2A%2A%2A&model_name=a+b&x=c=d&url=plain.mar"
    )


@pytest.mark.parametrize(
    "patterns, url, allowed",
    [
        # TorchServe's own default, and how its users write theirs.
        ("file://.*|http(s)?://.*", "https://h/m.mar", True),
        ("file://.*|http(s)?://.*", "file:///m.mar", True),
        ("file://.*|http(s)?://.*", "s3://b/m.mar", False),
        ("https://s3.amazonaws.com/.*,https://torchserve.pytorch.org/.*", "https://torchserve.pytorch.org/m.mar", True),
        (r"https:\/\/h\/.*", "https://h/m.mar", True),
        (r"^https://h/.*$", "https://h/m.mar", True),
        (".*", "http://h:81/m.mar", True),
        ("HTTPS://H/M\\.MAR", "https://h/m.mar", True),
        ("https://a/.*|https://b/.*", "https://b/m.mar", True),
        ("https://(a|b)\\.h/.*", "https://b.h/m.mar", True),
        ("https://[^/]+/ok/.*", "https://h/ok/m.mar", True),
        # A part of a URL cannot stand in for another one.
        (r"https://.*\.good\.example/.*", "https://a.good.example/m.mar", True),
        (r"https://.*\.good\.example/.*", "https://evil.example/a.good.example/m.mar", False),
        (r"https://.*\.good\.example/.*", "https://evil.example/?a.good.example/m.mar", False),
        ("https://good.example/.*", "https://goodXexample/m.mar", False),
        ("https://good.example.*", "https://good.example/m.mar", True),
        ("https://good.example.*", "https://good.example.evil.example/m.mar", False),
        ("https://good.example", "https://good.example/m.mar", False),
        (r"https://h/.*\.mar", "https://h/delete?f=m.mar", False),
        (r"https://h/.*\.mar", "https://h/m.mar?X-Sig=1", True),
        (r"https://h/get\?f=.*", "https://h/get?f=m.mar", True),
        (r"https://h/get\?f=.*", "https://h/get?g=m.mar", False),
        ("https://h/.*", "http://h/m.mar", False),
        ("https://h/.*", "https://h:8443/m.mar", False),
        (r"https://h(:\d+)?/.*", "https://h:8443/m.mar", True),
        ("https://h:443/.*", "https://h/m.mar", True),
        ("https://h/models/.*", "https://h/m.mar", False),
        ("file:///models/.*", "file:///models/m.mar", True),
        ("file:///models/.*", "file:///etc/m.mar", False),
        ("s3://b/.*", "s3://b/m.mar", True),
        ("s3://b/.*", "s3://bb/m.mar", False),
    ],
)
def test_patterns_match_part_by_part(patterns: str, url: str, allowed: bool) -> None:
    assert AllowedUrls(patterns).match(parse_url(url)) == allowed


@pytest.mark.parametrize(
    "patterns, problem",
    [
        ("models", "is not written scheme://host/path"),
        ("https://", "is not written scheme://host/path"),
        ("https://h/[", "cannot be read"),
        ("(https://h/.*)", "cannot be read"),
        ("ftp://.*", "no scheme there is"),
        ("https://h(/.*)?", "slash in its host"),
    ],
)
def test_pattern_that_could_never_match_is_an_error(patterns: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        AllowedUrls(f"https://fine/.*,{patterns}")


def test_no_pattern_allows_nothing() -> None:
    assert not AllowedUrls("") and not AllowedUrls(" , ")
    assert not AllowedUrls("").match(parse_url("https://h/m.mar"))


@pytest.mark.parametrize(
    "address, kind",
    [
        ("8.8.8.8", "public"), ("2001:4860:4860::8888", "public"), ("::ffff:8.8.8.8", "public"),
        ("64:ff9b::808:808", "public"), ("2002:808:808::1", "public"),
        ("127.0.0.1", "loopback"), ("127.8.8.8", "loopback"), ("::1", "loopback"), ("::ffff:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"), ("2002:7f00:1::1", "loopback"), ("2001:0:7f00:1::1", "loopback"),
        ("10.1.2.3", "private"), ("172.31.0.1", "private"), ("192.168.1.1", "private"), ("fd00:ec2::254", "private"),
        ("::ffff:10.0.0.1", "private"), ("100.64.0.1", "private"), ("198.18.0.1", "private"), ("fec0::1", "private"),
        ("169.254.169.254", "link-local"), ("::ffff:169.254.169.254", "link-local"), ("fe80::1%eth0", "link-local"),
        ("224.0.0.1", "multicast"), ("ff02::1", "multicast"), ("0.0.0.0", "unspecified"), ("::", "unspecified"),
        ("240.0.0.1", "reserved"), ("255.255.255.255", "reserved"),
        # What clouds answer on to their own machines, though it looks public.
        ("168.63.129.16", "reserved"), ("192.0.0.192", "reserved"), ("::ffff:168.63.129.16", "reserved"),
        ("192.88.99.1", "reserved"), ("3fff::1", "reserved"),
    ],
)  # fmt: skip
def test_address_is_told_from_a_public_one(address: str, kind: str) -> None:
    assert kind_of(address) == kind


def test_one_private_address_spoils_a_host() -> None:
    with pytest.raises(AddressError, match=r"the host h \(10\.0\.0\.1\) has a private address") as caught:
        addresses_of("h", 443, allow_private=False, resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"])
    assert caught.value.is_private
    found = addresses_of("h", 443, allow_private=True, resolve=lambda host, port: ["8.8.8.8", "10.0.0.1"])
    assert found == ["8.8.8.8", "10.0.0.1"]


def test_host_that_does_not_resolve_is_named() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise OSError(-2, "Name or service not known")

    with pytest.raises(AddressError, match="the host h cannot be resolved: Name or service not known") as caught:
        addresses_of("h", 443, allow_private=False, resolve=resolve)
    assert not caught.value.is_private
