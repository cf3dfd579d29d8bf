"""Prior precisions tuned while a Wide ResNet trains, beside a sweep and a search of the weight decay, by test NLL and CPU time.

    python experiments/wrn_tuning.py --config configs/wrn_tuning.yaml --data.root FOLDER

Rows: tuned by K-FAC-reduce, tuned by K-FAC-expand, fixed weight decays, and on one seed a search of the weight decay by Optuna in a
multiple of the time of the tuned training, after which the network is trained on all images. Each training is a run of its own in
`OUT/NAME/ROW-seedSEED`; what is finished is skipped, and what was cut off goes on from its last checkpoint. Several processes may run
at once: each leaves to the others what they are at, and `--rows` and `--seeds` give it a part. Prints and writes, as JSON and as a
picture, what is there; `--report_only true` does nothing else. The folder of the same name beside this file holds the parts.
"""

from __future__ import annotations

from wrn_tuning.command import main

if __name__ == "__main__":
    main()
