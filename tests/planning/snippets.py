"""Parts of programs compiled ahead of time for TPUs: a scan over 6 layers of weights sharded over
`fsdp`, a kernel written by hand, a sum between two slices. Shortened by hand; what the compiler
says of its own choices (backend_config) is left out."""

# devices 2 x 2, axes (fsdp, tensor); half of the forward loop, and the gradient of one weight
# behind it
SCAN = """HloModule jit_step, is_scheduled=true, num_partitions=4

FileNames
1 "/home/me/layers.py"
2 "/home/me/loop.py"
3 "/home/me/run.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=8 end_column=8}
2 {file_name_id=2 function_name_id=1 line=13 end_line=13 column=8 end_column=8}
3 {file_name_id=3 function_name_id=1 line=30 end_line=30 column=8 end_column=8}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %add.1 = bf16[]{:T(256)} add(%x, %y)
}

%sliced (param_0.143: f32[6,2048,512], param_1.152: s32[]) -> bf16[1,2048,512] {
  %param_0.143 = f32[6,2048,512]{2,1,0:T(8,128)} parameter(0)
  %param_1.152 = s32[]{:T(128)S(6)} parameter(1)
  %constant.207 = s32[]{:T(128)} constant(0)
  %dynamic-slice.47 = f32[1,2048,512]{2,1,0:T(8,128)} dynamic-slice(%param_0.143, %param_1.152, \
%constant.207, \
%constant.207), dynamic_slice_sizes={1,2048,512}
  ROOT %convert.45 = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} convert(%dynamic-slice.47)
}

%kept (param_0.141: bf16[6,256,1024], param_1.150: s32[], param_2.126: bf16[256,1024]) -> \
bf16[6,256,1024] {
  %param_0.141 = bf16[6,256,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_2.126 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(2)
  %bitcast.51 = bf16[1,256,1024]{2,1,0:T(8,128)(2,1)} bitcast(%param_2.126)
  %param_1.150 = s32[]{:T(128)S(6)} parameter(1)
  %constant.205 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-update-slice.9 = bf16[6,256,1024]{2,1,0:T(8,128)(2,1)} \
dynamic-update-slice(%param_0.141, \
%bitcast.51, %param_1.150, %constant.205, %constant.205)
}

%product (param_0: bf16[1,2048,1024], param_1: bf16[256,2048]) -> bf16[256,1024] {
  %param_0 = bf16[1,2048,1024]{2,1,0:T(8,128)(2,1)} parameter(0)
  %bitcast.1 = bf16[2048,1024]{1,0:T(8,128)(2,1)} bitcast(%param_0)
  %param_1 = bf16[256,2048]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} convolution(%param_1, %bitcast.1), \
dim_labels=bf_io->bf
}

%scattered (input.5: bf16[1024,2048]) -> bf16[512,2048] {
  %input.5 = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.14 = bf16[1024,2048]{1,0:T(8,128)(2,1)} all-reduce(%input.5), channel_id=11, \
replica_groups={{0,2},{1,3}}, use_global_device_ids=true, to_apply=%add
  %constant.shard_id_table.5 = u32[4]{0:T(128)} constant({0, 0, 1, 1})
  %partition-id.12 = u32[] partition-id()
  %dynamic-slice.53 = u32[1]{0:T(128)} dynamic-slice(%constant.shard_id_table.5, \
%partition-id.12), \
dynamic_slice_sizes={1}
  %bitcast.66 = u32[]{:T(128)} bitcast(%dynamic-slice.53)
  %constant.215 = u32[] constant(0)
  ROOT %dynamic-slice.54 = bf16[512,2048]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.14, \
%bitcast.66, \
%constant.215), dynamic_slice_sizes={512,2048}
}

%body (carried: (s32[], bf16[256,1024], bf16[6,256,1024], f32[6,2048,512])) -> (s32[], \
bf16[256,1024], \
bf16[6,256,1024], f32[6,2048,512]) {
  %constant.59 = s32[]{:T(128)} constant(1)
  %carried = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, \
bf16[6,256,1024]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/f32[6,2048,512]{2,1,0:T(8,128)}) parameter(0)
  %get-tuple-element.175 = s32[]{:T(128)} get-tuple-element(%carried), index=0
  %copy.6 = s32[]{:T(128)S(6)} copy(%get-tuple-element.175)
  %add.117 = s32[]{:T(128)} add(%copy.6, %constant.59)
  %get-tuple-element.176 = bf16[256,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%carried), index=1
  %get-tuple-element.177 = bf16[6,256,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carried), \
index=2
  %get-tuple-element.185 = f32[6,2048,512]{2,1,0:T(8,128)} get-tuple-element(%carried), index=3
  %slice_fusion.4 = bf16[1,2048,512]{2,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.185, \
%copy.6), kind=kLoop, \
calls=%sliced, metadata={op_name="step/scan/while/body/convert_element_type" stack_frame_id=3}
  %update_fusion.6 = bf16[6,256,1024]{2,1,0:T(8,128)(2,1)} fusion(%get-tuple-element.177, %copy.6, \
%get-tuple-element.176), kind=kLoop, calls=%kept, \
metadata={op_name="step/scan/while/body/dynamic_update_slice"}
  %all-gather.18 = bf16[1,2048,1024]{2,1,0:T(8,128)(2,1)} all-gather(%slice_fusion.4), \
channel_id=15, \
replica_groups=[2,2]<=[2,2]T(1,0), dimensions={2}, use_global_device_ids=true, \
metadata={op_name="step/scan/while/body/dot_general" stack_frame_id=3}
  %hidden = bf16[256,2048]{1,0:T(8,128)(2,1)S(1)} broadcast(%copy.6), dimensions={}
  %fusion.86 = bf16[256,1024]{1,0:T(8,128)(2,1)} fusion(%all-gather.18, %hidden), kind=kOutput, \
calls=%product
  %all-reduce.12 = bf16[256,1024]{1,0:T(8,128)(2,1)} all-reduce(%fusion.86), channel_id=4, \
replica_groups=[2,2]<=[4], use_global_device_ids=true, to_apply=%add
  ROOT %tuple.34 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, \
bf16[6,256,1024]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/f32[6,2048,512]{2,1,0:T(8,128)}) tuple(%add.117, %all-reduce.12, %update_fusion.6, \
%get-tuple-element.185)
}

%condition (carried.1: (s32[], bf16[256,1024], bf16[6,256,1024], f32[6,2048,512])) -> pred[] {
  %constant.65 = s32[]{:T(128)} constant(6)
  %carried.1 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, \
bf16[6,256,1024]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/f32[6,2048,512]{2,1,0:T(8,128)}) parameter(0)
  %get-tuple-element.99 = s32[]{:T(128)} get-tuple-element(%carried.1), index=0
  ROOT %lt.7 = pred[]{:T(512)} compare(%get-tuple-element.99, %constant.65), direction=LT
}

ENTRY %main.5_spmd (param.6: f32[6,2048,512], param.5: bf16[256,1024], param.7: bf16[1024,2048]) \
-> \
(bf16[256,1024], bf16[6,256,1024], bf16[512,2048]) {
  %constant.77 = s32[]{:T(128)} constant(0)
  %param.6 = f32[6,2048,512]{2,1,0:T(8,128)} parameter(0), metadata={op_name="weights"}
  %param.5 = bf16[256,1024]{1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="x"}
  %param.7 = bf16[1024,2048]{1,0:T(8,128)(2,1)} parameter(2), metadata={op_name="gradient"}
  %custom-call = bf16[6,256,1024]{2,1,0:T(8,128)(2,1)} custom-call(), \
custom_call_target="AllocateBuffer"
  %tuple.32 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, \
bf16[6,256,1024]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/f32[6,2048,512]{2,1,0:T(8,128)}) tuple(%constant.77, %param.5, %custom-call, %param.6)
  %while.25 = (s32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)}, \
bf16[6,256,1024]{2,1,0:T(8,128)(2,1)}, \
/*index=3*/f32[6,2048,512]{2,1,0:T(8,128)}) while(%tuple.32), condition=%condition, body=%body, \
metadata={op_name="step/scan/while" stack_frame_id=2}
  %get-tuple-element.95 = bf16[256,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%while.25), index=1
  %get-tuple-element.96 = bf16[6,256,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while.25), \
index=2
  %fusion.101 = bf16[512,2048]{1,0:T(8,128)(2,1)} fusion(%param.7), kind=kCustom, \
calls=%scattered, \
metadata={op_name="step/gradient"}
  ROOT %tuple.38 = (bf16[256,1024]{1,0:T(8,128)(2,1)}, bf16[6,256,1024]{2,1,0:T(8,128)(2,1)}, \
bf16[512,2048]{1,0:T(8,128)(2,1)}) tuple(%get-tuple-element.95, %get-tuple-element.96, %fusion.101)
}
"""

# 4 devices; the kernel's configuration holds newlines, and what follows must be read as well
KERNEL = """HloModule jit_f, is_scheduled=true, num_partitions=4

%region_0.0 (reduce_sum.0: f32[], reduce_sum.1: f32[]) -> f32[] {
  %reduce_sum.1 = f32[]{:T(128)} parameter(1)
  %reduce_sum.0 = f32[]{:T(128)} parameter(0)
  ROOT %reduce_sum.2 = f32[]{:T(128)} add(%reduce_sum.0, %reduce_sum.1)
}

%fused_computation (param_0: f32[128,256], param_1.1: f32[]) -> f32[128,256] {
  %param_0 = f32[128,256]{1,0:T(8,128)S(1)} parameter(0)
  %param_1.1 = f32[]{:T(128)} parameter(1)
  %add.7 = f32[128,256]{1,0:T(8,128)} broadcast(%param_1.1), dimensions={}
  ROOT %add.6 = f32[128,256]{1,0:T(8,128)} add(%param_0, %add.7)
}

ENTRY %main.0_spmd (param.1: f32[128,256], param.2: f32[128,256]) -> f32[128,256] {
  %constant.0.clone = f32[]{:T(128)} constant(0)
  %param.2 = f32[128,256]{1,0:T(8,128)} parameter(1), metadata={op_name="b"}
  %param.1 = f32[128,256]{1,0:T(8,128)} parameter(0), metadata={op_name="a"}
  %copy-start = (f32[128,256]{1,0:T(8,128)S(1)}, f32[128,256]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%param.1)
  %reduce = f32[]{:T(128)} reduce(%param.2, %constant.0.clone), dimensions={0,1}, \
to_apply=%region_0.0
  %copy-done = f32[128,256]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %shard_map.12 = f32[128,256]{1,0:T(8,128)S(1)} custom-call(%copy-done), \
custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/shard_map/pallas_call"}, \
backend_config={"custom_call_config":{"body":"TUzv
}}
  (of a kernel)
"}}
  %all-reduce = f32[]{:T(128)} all-reduce(%reduce), channel_id=1, \
replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0','axis_1'}, use_global_device_ids=true, \
to_apply=%region_0.0
  ROOT %broadcast_add_fusion = f32[128,256]{1,0:T(8,128)} fusion(%shard_map.12, %all-reduce), \
kind=kLoop, \
calls=%fused_computation, metadata={op_name="jit(f)/add"}
}
"""

# one of two slices of 4 devices; a gradient is summed by the slices' hosts
SLICES = """HloModule jit_step, is_scheduled=true, num_partitions=4

ENTRY %main.5_spmd (param.1: bf16[1024,8,128]) -> bf16[1024,8,128] {
  %param.1 = bf16[1024,8,128]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="gradient"}
  %after-all.4 = token[] after-all()
  %recv.4 = (bf16[1024,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all.4), \
channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.4 = (bf16[1024,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%param.1, %after-all.4), \
channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.4 = token[] send-done(%send.4), channel_id=2, is_host_transfer=true
  %recv-done.4 = (bf16[1024,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv.4), channel_id=1
  ROOT %get-tuple-element.1 = bf16[1024,8,128]{2,1,0:T(8,128)(2,1)} \
get-tuple-element(%recv-done.4), index=0
}
"""
