"""The certificate that a client of HTTPS streams sends, and the authorities that it trusts."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NamedTuple

from host.errors import InvalidArgumentError, UnavailableError

if TYPE_CHECKING:
    import ssl


class TlsFiles(NamedTuple):
    """PEM files; without ``ca`` the host's own authorities are trusted."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    @classmethod
    def of(cls, options: argparse.Namespace) -> TlsFiles:
        """The files named on the command line."""
        return cls(options.tls_ca, options.tls_cert, options.tls_key)

    def context(self) -> ssl.SSLContext:
        """The TLS context of connections to the agent. Raises InvalidArgumentError if a file cannot be used."""
        import ssl  # imported here: loading it takes longer than most commands

        if self.key is not None and self.certificate is None:
            raise InvalidArgumentError("--tls-key needs its certificate: give --tls-cert too")
        try:
            context = ssl.create_default_context(cafile=self.ca)
            # Python 3.13 sets this, which refuses private authorities without key usage; kubectl accepts them.
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(file for file in self if file is not None)
            reason = getattr(error, "reason", None) or error.strerror or error
            raise InvalidArgumentError(f"{files}: not to be used for TLS: {reason}; PEM files are needed") from error
        return context


def refusal(where: str, error: OSError) -> UnavailableError:
    """The error for a TLS handshake that failed on our side."""
    reason = getattr(error, "verify_message", None) or getattr(error, "reason", None) or str(error)
    return UnavailableError(
        f"the agent's streams at {where} cannot be trusted: {reason}; "
        "name the authority that signed its certificate with --tls-ca"
    )
