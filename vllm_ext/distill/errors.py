# SPDX-License-Identifier: Apache-2.0
"""What goes wrong in distilling because of what was given."""


class DistillError(ValueError):
    """The target, the texts, the settings or the folder cannot be used; the message says why."""
