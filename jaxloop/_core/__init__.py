from pathlib import Path

from jaxloop._core.installation import check_no_foreign_files

# Here and not in `jaxloop/__init__.py`, because the other distribution may have replaced that file.
check_no_foreign_files(Path(__file__).parent.parent)
