# Sets up CANN, as the vendor's image does: the engine is on PATH only after this file was sourced.
export ASCEND_HOME_PATH=/usr/local/Ascend/latest
export PATH=$ASCEND_HOME_PATH/bin:$PATH
export LD_LIBRARY_PATH=/usr/local/Ascend/driver/lib64:$ASCEND_HOME_PATH/lib64
# Overwrites what was set before: a start script that wants other values exports them afterwards.
export ASCEND_GLOBAL_LOG_LEVEL=1
export HCCL_CONNECT_TIMEOUT=120
