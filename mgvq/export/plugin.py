"""What lmms-eval finds under the entry point `lmms_eval.models`: the model `mgvq`, for its own command line.

lmms-eval --model mgvq --model_args pretrained=CHECKPOINT --tasks mme --batch_size 8
"""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("mgvq", simple_class_path="mgvq.export.lmms.CheckpointModel")
