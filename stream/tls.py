"""TLS contexts from PEM files, for brokers and for the HTTP port; what is wrong is said at once."""

import ssl
from pathlib import Path

from tsdiff.errors import ConfigError


def trusting(key: str, cafile: Path | None) -> ssl.SSLContext:
    """Trust `cafile` (None: what the system trusts); `key` names the setting or option.

    Raises:
        ConfigError: the file cannot be used.

    """
    context = ssl.create_default_context()
    if cafile is not None:
        # In place of the system's certificates, not beside them.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _trust(context, key, cafile)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def client_context(
    section: str, cafile: Path | None, certfile: Path | None, keyfile: Path | None
) -> ssl.SSLContext:
    """Trust `cafile` (None: what the system trusts) and show a certificate where there is one.

    Raises:
        ConfigError: a file cannot be used; `section` is where its key stands in the settings.

    """
    context = trusting(f"{section}.ssl_cafile", cafile)
    if certfile is not None and keyfile is not None:
        _show(context, f"{section}.ssl_certfile and ssl_keyfile", certfile, keyfile)
    return context


def server_context(
    section: str, certfile: Path, keyfile: Path, client_cafile: Path | None
) -> ssl.SSLContext:
    """Show a certificate; with `client_cafile` let in only those who show one signed by it.

    Raises:
        ConfigError: a file cannot be used; `section` is where its key stands in the settings.

    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _show(context, f"{section}.tls_certfile and tls_keyfile", certfile, keyfile)
    if client_cafile is not None:
        _trust(context, f"{section}.tls_client_cafile", client_cafile)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _trust(context: ssl.SSLContext, key: str, cafile: Path) -> None:
    try:
        context.load_verify_locations(cafile)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: expected certificates (PEM) in {cafile}: {_why(error)}"
        ) from None


def _show(context: ssl.SSLContext, keys: str, certfile: Path, keyfile: Path) -> None:
    def no_passphrase() -> str:
        raise ValueError("the key has a passphrase; write it without one")

    try:
        context.load_cert_chain(certfile, keyfile, password=no_passphrase)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{keys}: expected a certificate and its key (PEM) in {certfile} and {keyfile}: "
            f"{_why(error)}"
        ) from None


def _why(error: OSError | ValueError) -> str:
    """Say it without OpenSSL's source lines."""
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    return str(reason).replace("_", " ").lower() if isinstance(error, ssl.SSLError) else str(reason)
