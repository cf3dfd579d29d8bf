"""The study of what files lose in half precision, at small size."""

import file_precision
import pytest


@pytest.mark.long
def test_rows():
    config = file_precision.FilesConfig(
        networks=["lenet"], structures=["kron"], n_train=50, n_test=5, n_epochs=1, sizes_of_resnet18=False
    )
    found = file_precision.run(config)
    by_dtype = {row["dtype"]: row for row in found["rows"]}
    assert list(by_dtype) == ["own", "float32", "float16", "bfloat16"]
    assert by_dtype["own"]["evidence_error"] == by_dtype["own"]["variance_error_largest"] == 0
    assert by_dtype["float16"]["megabytes"] < by_dtype["float32"]["megabytes"] < by_dtype["own"]["megabytes"]
    assert 0 < by_dtype["float16"]["variance_error_largest"] < by_dtype["bfloat16"]["variance_error_largest"] < 0.1
    assert len(file_precision.as_markdown(found).splitlines()) == 2 + len(found["rows"])
