"""URL, key and errors of an OpenAI-compatible API, for the generator and the judge."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from rlrag.errors import ConfigError

DEFAULT_KEY_VARIABLE = "OPENAI_API_KEY"
_LONGEST_TEXT = 300


def check_address(url: str, what: str) -> None:
    """Refuse what is no address of an API, and an address that would carry a secret into files.

    Args:
        url: The address.
        what: What it is called in the error.

    Raises:
        ConfigError: with the address, or without it where it holds a secret.

    Example:
        >>> check_address("http://127.0.0.1:8000/v1", "generator.url")
        >>> check_address("localhost", "generator.url")
        Traceback (most recent call last):
        ...
        rlrag.errors.ConfigError: generator.url 'localhost' is not a URL; give one such as \
http://127.0.0.1:8000/v1
    """
    try:
        address = urlsplit(url)
        is_address = address.scheme in ("http", "https") and bool(address.hostname)
        has_user = "@" in address.netloc
        _ = address.port  # raises where it is no number
    except ValueError:
        is_address, has_user = False, "@" in url
    if has_user:
        raise ConfigError(f"{what} contains a password; put the key into an environment variable")
    if "?" in url or "#" in url:
        raise ConfigError(
            f"{what} has a query or fragment ('?' or '#'), which often contains a key; end it "
            "after the path, as in http://127.0.0.1:8000/v1, and put the key into an "
            "environment variable"
        )
    if not is_address:
        raise ConfigError(f"{what} {url!r} is not a URL; give one such as http://127.0.0.1:8000/v1")


def read_key(variable: str, named_by: str) -> str | None:
    """The key in an environment variable; None where the default one is not set.

    Args:
        variable: Its name.
        named_by: The flag or field that gave the name.

    Raises:
        ConfigError: when another variable than the default was named and is not set.
    """
    key = os.environ.get(variable, "").strip()  # a file's line break is no part of a key
    if not key and variable != DEFAULT_KEY_VARIABLE:
        raise ConfigError(f"{named_by} names {variable}, which is not set; set it to the key")
    return key or None


def describe_error(error: BaseException, key: str | None) -> str:
    """What an error says, in one line of bounded length and without the key.

    Example:
        >>> describe_error(ValueError("the key sk-1 is wrong"), "sk-1")
        'ValueError: the key *** is wrong'
    """
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if key:
        text = text.replace(key, "***")
    return text if len(text) <= _LONGEST_TEXT else f"{text[: _LONGEST_TEXT - 1]}…"
