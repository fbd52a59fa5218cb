"""The watchdog of a machine; a training run starts it."""

import sys

from vishwamai_mp.diagnosis.watchdog import main

if __name__ == "__main__":
    main(sys.argv[1])
