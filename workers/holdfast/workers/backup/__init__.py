"""Backups: a directory of objects named by their content, and a manifest for each backup.

::

    DIR/holdfast-backups.json   the version of this layout
    DIR/lock                    flock of the one who writes
    DIR/objects/ab/<sha256>     what the backups consist of; each object once, however many backups hold it
    DIR/tmp/                    what is being written
    DIR/unfinished.ndjson       what a backup that has not ended has stored so far
    DIR/manifests/<id>.json     a backup; written last, so one that was cut off is none

Everything but taking images of the streams blocks: it runs in threads.
"""
