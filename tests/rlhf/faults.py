"""Writes that fail: one call that changes the disk raises, by its name or its number."""

import builtins
import errno
import io
import os
import pathlib
import shutil

import safetensors.torch
import transformers.modeling_utils

FULL = OSError(errno.ENOSPC, "No space left on device")


class Crash(BaseException):
    """The process is gone: nothing after it touches the disk."""


class Faults:
    """Counts the calls that change the disk; one of number or name `at` raises `error`; after a Crash all do."""

    def __init__(self, monkeypatch):
        self.error, self.at, self.calls, self.dead = None, 0, [], False
        for owner, name in [
            (builtins, "open"),
            (io, "open"),  # of pathlib
            (os, "fsync"),
            (pathlib.Path, "mkdir"),
            (pathlib.Path, "rename"),
            (pathlib.Path, "write_text"),
            (safetensors.torch, "save_file"),
            (shutil, "rmtree"),
            (transformers.modeling_utils, "safe_save_file"),
        ]:
            monkeypatch.setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _wrapped(self, name, real):
        def call(*arguments, **options):
            if name != "open":
                self.count(name)
                return real(*arguments, **options)
            if not {"w", "a", "x"} & set(str([*arguments[1:2], *options.values()])):
                return real(*arguments, **options)
            self.count(name)
            return File(real(*arguments, **options), self)

        return call

    def count(self, name):
        self.calls.append(name)
        if self.dead or self.at in (name, len(self.calls)):
            self.dead = isinstance(self.error, Crash)
            raise self.error

    def arm(self, error=None, at=0):
        self.error, self.at, self.calls, self.dead = error, at, [], False


class File:
    """An open file whose writes are counted."""

    def __init__(self, file, faults):
        self._file, self._faults = file, faults

    def write(self, data):
        self._faults.count("write")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def bytes_below(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
